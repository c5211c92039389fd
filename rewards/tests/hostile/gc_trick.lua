-- may end in: ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do setmetatable({}, { __gc = function() while true do end end, __mode = "k" }) return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
