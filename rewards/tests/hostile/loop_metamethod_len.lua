-- may end in: timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local t = setmetatable({}, { __len = function() while true do end end }) return #t end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
