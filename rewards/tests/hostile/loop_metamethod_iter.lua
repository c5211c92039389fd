-- may end in: timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do for _ in setmetatable({}, { __iter = function() return function() return 1 end end }) do end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
