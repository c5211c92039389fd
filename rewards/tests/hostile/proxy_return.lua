-- may end in: wrong_type
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return setmetatable({}, { __index = function() return 1 end }) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
